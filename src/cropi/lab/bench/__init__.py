"""Speed, memory and accuracy of the influence engine, against floors and other engines (`cropi bench`)."""
