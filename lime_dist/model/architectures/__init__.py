"""One folder per architecture; its ``__init__`` registers the object that `lime_dist.model.architecture` describes."""
