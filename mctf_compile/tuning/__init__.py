"""A schedule that keeps a promise: found on one half of some images, certified on the other."""
