"""`txcore launch`: ranks placed on hosts, started, watched and ended.

Imports `cli`, `launch.join`, `launch.watch`.
"""
