"""What is tuned: what each kind of ``tuning.peft`` reads, adapters attached, options that peft ignores."""
