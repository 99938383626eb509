"""Floor 1: meshes, logical axis rules, shardings and rematerialisation policies."""
