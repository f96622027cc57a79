"""Studies that take hours: does a converted network learn more than the static one?"""
