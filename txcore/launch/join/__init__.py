"""Joining the processes of one run: who they are, where they meet.

Imports `launch.watch` and below.
"""
