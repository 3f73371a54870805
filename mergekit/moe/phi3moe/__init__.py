"""The code of a ``phi3moe`` model, copied into the model's folder as it is: so nothing of mergekit is imported here."""
