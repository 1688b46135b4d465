"""FwdLLM: fine-tuning by perturbed forward passes."""
