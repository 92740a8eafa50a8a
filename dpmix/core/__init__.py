"""All that the guarantee rests on, and nothing else: see GUARANTEE.md beside this file. Imports no other room."""
