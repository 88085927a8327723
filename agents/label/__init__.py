"""The page on which people choose between two pictures of a prompt, and the commands around it."""
