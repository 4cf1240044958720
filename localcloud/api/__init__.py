"""Google's REST APIs, as far as the program and its clients use them."""
