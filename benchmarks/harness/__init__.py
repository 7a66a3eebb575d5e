"""What the benchmark scripts share, in reading order: settings, strategies, run, executors, jobs, report,
cli; search.

What they import when loaded doesn't import torch, so that a command answers at once; the runs
happen in worker processes, which do.
"""
