"""Joining the processes of one run: who they are, where they meet.

Imports `_compat`, `errors`, `launch.watch`.
"""
