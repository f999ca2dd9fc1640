"""Learning-rate schedules, one file each; ``optimizer.schedule`` chooses."""
