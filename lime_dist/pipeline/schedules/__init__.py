"""Pipeline schedules, one file each; ``pipeline.schedule`` chooses. Importing this package imports neither torch nor DeepSpeed."""
