"""What the server measures of its answers, in numbers, and the dashboard and alerts made of it."""
