"""What each part writes towards the answer: logit attribution, lenses, patterns, roles."""
