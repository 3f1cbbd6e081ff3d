"""What systems are made of: backbones, vision encoders, planner, refiner, diffusion, action tokens."""
