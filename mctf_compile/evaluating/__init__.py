"""What a setting costs in accuracy, and saves in work, time and memory, on images of your own.

Images and options -> what the model says of each image, kept on disk where asked -> paired statistics -> table, JSON,
plot.
"""
