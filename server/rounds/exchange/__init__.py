"""One exchange with clients: what is written and asked, what comes back, and what each reply counts for."""
