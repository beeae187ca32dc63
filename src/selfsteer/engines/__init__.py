"""Who answers: every engine has the same generate()."""
