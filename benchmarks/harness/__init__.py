"""Modules of the benchmark scripts. In reading order: data, settings and recipes (a run as data); build, run
and jobs (training); store, studies, tables and figures (results); cli and search (command lines).

Modules that a script imports at its start don't import torch, so that a command answers at once. Workers do.
"""
