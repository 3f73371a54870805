"""Recipe, headers and layouts made into a plan: every output tensor's expression, file and offset.

Here: decisions about what will happen. Not here: reading weights, writing files. To add a kind of expression, add a
node to ``expression``, let ``express`` make it, and give ``execute`` a way to follow it. This file imports nothing:
``mergekit inspect`` opens models without recipes and methods.
"""
