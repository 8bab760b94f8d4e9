"""Join the processes of one run: detect the cluster, meet, connect to the coordinator.

Imports `_compat`, `errors`, `launch.watch`.
"""
