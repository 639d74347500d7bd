# Types of the compiled core, one section per folder of csrc/.

cuda_built: bool
