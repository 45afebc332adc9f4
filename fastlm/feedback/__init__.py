"""What people say becomes rows, and a new model is measured against the old one."""
