"""How the embedded stand-ins were made: glyphs, tiny encoders, small generator."""
