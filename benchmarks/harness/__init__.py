"""What the benchmark scripts share, in reading order: settings, strategies, run, jobs, report, cli.

``settings``, ``jobs``, ``report`` and ``cli`` don't import torch, so that a command answers at once; the runs
happen in worker processes, which do.
"""
