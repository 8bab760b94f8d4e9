"""What must be equal on all ranks and devices: agreed on, compared, copied.

Imports `launch`.
"""
