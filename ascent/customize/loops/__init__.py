"""One loop for each kind of data: demonstrations, preferences, prompts with a grader."""
