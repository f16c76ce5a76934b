"""How options are declared and checked, and the schedules that ``r`` may be."""
