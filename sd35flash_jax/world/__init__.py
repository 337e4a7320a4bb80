"""The world that flash-mini knows: a few hundred named things, how scenes of them are laid out, described and drawn."""
