"""`txcore launch`: ranks placed on hosts, started, watched and ended.

Imports `launch.watch.status` only.
"""
