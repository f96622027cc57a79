"""Running a model once to learn which layers it calls, with which shapes, and who else uses their weights."""
