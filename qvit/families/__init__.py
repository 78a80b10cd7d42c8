"""What qvit knows of each timm family: which modules it may have, how to swap them, how to rebuild it from a description.

A family here is one file; what they share is in `qvit.families.swap`. `qvit.convert` finds a family by the model's class;
`qvit.integer.freeze` reads the swapped modules.
"""
