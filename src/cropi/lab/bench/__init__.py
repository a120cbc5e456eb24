"""Speed, memory and accuracy of the influence engine, against floors (`cropi bench`)."""
