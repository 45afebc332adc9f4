"""Language models that judge answers, and the labels that measure their error."""
