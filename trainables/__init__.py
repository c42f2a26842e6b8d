"""What a trial trains (tasks) and how Ray runs it."""
