"""The forms of a conditional layer in an exported graph: which there are, which a layer has, and their modules."""
