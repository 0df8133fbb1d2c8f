"""Which latents cause the behaviour: from cheap estimates to generation, with the nulls beside them."""
