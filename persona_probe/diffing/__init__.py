"""Which latents did a fine-tune move, by how much, and more than a benign one would?"""
