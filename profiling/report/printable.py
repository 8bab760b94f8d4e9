"""Text from compiled programs made safe to show; it lies on the ground floor, for all."""

from txcore.outside import printable as printable
