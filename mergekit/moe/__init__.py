"""Mixtures of experts from dense models: recipe, output families, routers; builds a plan like any other.

Here: which tensor of which model becomes what of a mixture, and how routers are made from prompts. Not here: reading
weights for the output, writing files. To add an output family, add a record to ``targets``.
"""
