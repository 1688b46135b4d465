"""Full fine-tuning, averaged."""
