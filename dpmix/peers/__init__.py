"""The same mechanism in other people's idiom."""
