"""State dicts of other implementations (timm, the authors of ODConv), read and written exactly."""
