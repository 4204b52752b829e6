"""Tasks: one LightningModule for each, and what their training shares."""
