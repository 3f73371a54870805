"""Make one Phi-3 mixture of experts from several Phi-3 models, as the manual has it:

python mergekit/scripts/phi3_moe.py RECIPE.yml OUT_FOLDER [options]

This is ``mergekit-moe`` with the output form ``phi3moe`` by default.
"""

from mergekit.cli.moe import phi3_moe

if __name__ == "__main__":
    phi3_moe()
