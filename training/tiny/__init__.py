"""The parts of the embedded model, each made from nothing but seeds."""
