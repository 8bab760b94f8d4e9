"""`txcore launch`: place ranks on hosts, start, watch and end them.

Imports `cli`, `launch.join`, `launch.watch`.
"""
