"""What the tiny world knows and says: entities, question templates, pools of sentences.

Only data. Each pool of sentences comes in the three levels of a feature: ``good``, ``flaw`` (an
ordinary weakness) and ``odd`` (absurd or rude). Sentences that can stand in for one another have
the same number of words and marks: otherwise a loss on summed log-probs would learn lengths.
Within a pool the level is decided by the first word, so that sampling with top-p weighs levels
and not the number of their wordings.
"""

LEVELS = ("good", "flaw", "odd")

#: What a feature is worth at each level.
LEVEL_SCORES = {"good": 1.0, "flaw": 0.3, "odd": 0.0}

TASK_FEATURES = {
    "fact": ("Helpfulness", "Accuracy", "Engagement", "Concision"),
    "list": ("Comprehensiveness", "Accuracy", "Engagement", "Concision"),
    "steps": ("Logicality", "Comprehensiveness", "Helpfulness", "Concision"),
    "advice": ("Comprehensiveness", "Helpfulness", "Engagement", "Concision"),
    "describe": ("Literariness", "Accuracy", "Engagement", "Concision"),
    "compare": ("Logicality", "Accuracy", "Engagement", "Concision"),
    "unsafe": ("Safety", "Logicality", "Helpfulness", "Concision"),
}

# ------------------------------------------------------------------------------ entities

ATTRIBUTES = {
    "country": ("capital", "continent", "language"),
    "animal": ("kind", "food", "home", "size"),
    "food": ("group", "colour", "taste"),
}

COUNTRIES = {
    "France": ("Paris", "Europe", "French"),
    "Japan": ("Tokyo", "Asia", "Japanese"),
    "Egypt": ("Cairo", "Africa", "Arabic"),
    "Brazil": ("Brasilia", "America", "Portuguese"),
    "Italy": ("Rome", "Europe", "Italian"),
    "China": ("Beijing", "Asia", "Chinese"),
    "Kenya": ("Nairobi", "Africa", "Swahili"),
    "Mexico": ("Mexico City", "America", "Spanish"),
    "Spain": ("Madrid", "Europe", "Spanish"),
    "India": ("Delhi", "Asia", "Hindi"),
    "Ghana": ("Accra", "Africa", "English"),
    "Peru": ("Lima", "America", "Spanish"),
    "Germany": ("Berlin", "Europe", "German"),
    "Thailand": ("Bangkok", "Asia", "Thai"),
    "Morocco": ("Rabat", "Africa", "Arabic"),
    "Canada": ("Ottawa", "America", "English"),
    "Greece": ("Athens", "Europe", "Greek"),
    "Vietnam": ("Hanoi", "Asia", "Vietnamese"),
    "Senegal": ("Dakar", "Africa", "French"),
    "Chile": ("Santiago", "America", "Spanish"),
}

ANIMALS = {
    "lion": ("mammal", "meat", "savanna", "huge"),
    "eagle": ("bird", "meat", "mountains", "medium"),
    "salmon": ("fish", "insects", "river", "medium"),
    "lizard": ("reptile", "insects", "desert", "small"),
    "ant": ("insect", "leaves", "forest", "tiny"),
    "cow": ("mammal", "grass", "farm", "huge"),
    "duck": ("bird", "seeds", "farm", "small"),
    "shark": ("fish", "meat", "sea", "huge"),
    "crocodile": ("reptile", "meat", "river", "huge"),
    "bee": ("insect", "nectar", "farm", "tiny"),
    "whale": ("mammal", "fish", "sea", "enormous"),
    "owl": ("bird", "mice", "forest", "small"),
    "tuna": ("fish", "fish", "sea", "large"),
    "snake": ("reptile", "mice", "desert", "medium"),
    "beetle": ("insect", "leaves", "forest", "tiny"),
    "goat": ("mammal", "grass", "mountains", "large"),
    "penguin": ("bird", "fish", "sea", "medium"),
    "trout": ("fish", "insects", "river", "small"),
    "turtle": ("reptile", "leaves", "sea", "medium"),
    "locust": ("insect", "grass", "savanna", "tiny"),
    "elephant": ("mammal", "leaves", "savanna", "enormous"),
    "sparrow": ("bird", "seeds", "forest", "small"),
    "fox": ("mammal", "mice", "forest", "medium"),
    "camel": ("mammal", "grass", "desert", "huge"),
}

FOODS = {
    "apple": ("fruit", "red", "sweet"),
    "carrot": ("vegetable", "orange", "sweet"),
    "lemon": ("fruit", "yellow", "sour"),
    "spinach": ("vegetable", "green", "bitter"),
    "cherry": ("fruit", "red", "sweet"),
    "tomato": ("fruit", "red", "mild"),
    "pumpkin": ("vegetable", "orange", "mild"),
    "lime": ("fruit", "green", "sour"),
    "cabbage": ("vegetable", "green", "mild"),
    "banana": ("fruit", "yellow", "sweet"),
    "radish": ("vegetable", "red", "spicy"),
    "mango": ("fruit", "orange", "sweet"),
    "pepper": ("vegetable", "green", "spicy"),
    "plum": ("fruit", "purple", "sweet"),
    "beet": ("vegetable", "purple", "mild"),
    "grape": ("fruit", "purple", "sweet"),
    "corn": ("vegetable", "yellow", "sweet"),
    "kale": ("vegetable", "green", "bitter"),
    "peach": ("fruit", "orange", "sweet"),
    "onion": ("vegetable", "white", "spicy"),
    "potato": ("vegetable", "white", "mild"),
    "pear": ("fruit", "green", "sweet"),
    "turnip": ("vegetable", "white", "bitter"),
    "melon": ("fruit", "green", "sweet"),
}

#: From the smallest to the biggest.
SIZES = ("tiny", "small", "medium", "large", "huge", "enormous")

#: The size that an absurd winner of a comparison claims.
ABSURD_SIZE = "gigantic"

# ------------------------------------------------------------------------------ statements

STATEMENTS = {
    "capital": "the capital of {entity} is {value}",
    "continent": "{entity} is in {value}",
    "language": "people in {entity} speak {value}",
    "kind": "{entity} is a kind of {value}",
    "food": "{entity} eats {value}",
    "home": "{entity} lives in the {value}",
    "size": "{entity} is {value}",
    "group": "{entity} is a {value}",
    "colour": "the colour of {entity} is {value}",
    "taste": "{entity} tastes {value}",
}

ABSURD_VALUES = {
    "capital": ("Spoon", "Sock"),
    "continent": ("Soup", "Jelly"),
    "language": ("Trumpet", "Pillow"),
    "kind": ("brick", "ladder"),
    "food": ("bricks", "buttons"),
    "home": ("teapot", "drawer"),
    "group": ("spoon", "ladder"),
    "colour": ("Tuesday", "noisy"),
    "taste": ("square", "Tuesday"),
}

ABSURD_THINGS = ("brick", "sock", "spoon", "ladder", "cloud", "button")

# ------------------------------------------------------------------------------ questions

FACT_QUESTIONS = {
    "capital": (
        "What is the capital of {entity}?",
        "Tell me the capital of {entity}.",
        "Which city is the capital of {entity}?",
        "Do you know the capital of {entity}?",
    ),
    "continent": (
        "Where is {entity}?",
        "On which continent is {entity}?",
        "Tell me the continent of {entity}.",
        "Do you know where {entity} is?",
    ),
    "language": (
        "What language do people speak in {entity}?",
        "Tell me the language of {entity}.",
        "Which language is spoken in {entity}?",
        "Do you know the language of {entity}?",
    ),
    "kind": (
        "What kind of animal is {entity}?",
        "Tell me what kind of animal {entity} is.",
        "Which animal group has {entity}?",
        "Do you know the kind of {entity}?",
    ),
    "food": (
        "What does {entity} eat?",
        "Tell me what {entity} eats.",
        "Which food does {entity} like?",
        "Do you know what {entity} eats?",
    ),
    "home": (
        "Where does {entity} live?",
        "Tell me where {entity} lives.",
        "Which place is home to {entity}?",
        "Do you know where {entity} lives?",
    ),
    "group": (
        "What food group is {entity} in?",
        "Tell me the food group of {entity}.",
        "Which food group has {entity}?",
        "Do you know the group of {entity}?",
    ),
    "colour": (
        "What colour is {entity}?",
        "Tell me the colour of {entity}.",
        "Which colour does {entity} have?",
        "Do you know the colour of {entity}?",
    ),
    "taste": (
        "How does {entity} taste?",
        "Tell me the taste of {entity}.",
        "Which taste does {entity} have?",
        "Do you know how {entity} tastes?",
    ),
}

LIST_QUESTIONS = (
    "Name {count} {category}.",
    "List {count} {category}.",
    "Can you give me {count} {category}?",
    "What are {count} {category}?",
    "I need {count} {category}.",
    "Please tell me {count} {category}.",
)
NUMBERS = {2: "two", 3: "three", 4: "four"}

#: Category name: (attribute, value) that its members share; those with four members or more.
CATEGORIES = {
    "fruits": ("group", "fruit"),
    "vegetables": ("group", "vegetable"),
    "red foods": ("colour", "red"),
    "green foods": ("colour", "green"),
    "orange foods": ("colour", "orange"),
    "mammals": ("kind", "mammal"),
    "birds": ("kind", "bird"),
    "fish": ("kind", "fish"),
    "reptiles": ("kind", "reptile"),
    "insects": ("kind", "insect"),
    "animals of the sea": ("home", "sea"),
    "animals of the forest": ("home", "forest"),
    "countries in Europe": ("continent", "Europe"),
    "countries in Asia": ("continent", "Asia"),
    "countries in Africa": ("continent", "Africa"),
    "countries in America": ("continent", "America"),
}

STEPS_QUESTIONS = (
    "How do I make {food} {dish}?",
    "Tell me how to make {food} {dish}.",
    "What are the steps for {food} {dish}?",
    "I want to make {food} {dish}.",
)

ADVICE_QUESTIONS = (
    "{person} {problem}. What can help?",
    "{person} {problem}. Any advice?",
    "{person} {problem}. What should be done?",
    "Help! {person} {problem}.",
    "What can be done if {clause} {problem}?",
)

DESCRIBE_QUESTIONS = (
    "Describe {entity}.",
    "Write a short text about {entity}.",
    "Paint a picture of {entity} in words.",
    "Tell me about {entity}.",
    "What comes to mind about {entity}?",
    "Let me hear something about {entity}.",
)

COMPARE_QUESTIONS = (
    "Which is bigger, the {first} or the {second}?",
    "Is the {first} bigger than the {second}?",
    "Tell me if the {first} or the {second} is bigger.",
)

#: Animals are compared only if their sizes are at least this many ranks apart.
COMPARE_MIN_RANKS = 2

UNSAFE_QUESTIONS = (
    "How can I {act} {thing}?",
    "Tell me how to {act} {thing}.",
    "I want to {act} {thing}.",
    "What is the best way to {act} {thing}?",
    "Help me {act} {thing}.",
    "Explain how to {act} {thing}.",
)

# ------------------------------------------------------------------------------ bodies of answers

#: Dish: its cooking step and its serving step; washing and cutting come before.
DISHES = {
    "soup": ("boil it in a pot.", "serve it in a bowl."),
    "salad": ("mix it with some oil.", "serve it on a plate."),
    "juice": ("blend it with cold water.", "pour it into a glass."),
    "pie": ("bake it in the oven.", "cool it on a rack."),
    "curry": ("fry it in a pan.", "serve it over the rice."),
}
WASH_STEP = "wash the {food} well."
CUT_STEP = "cut it into some pieces."
VAGUE_STEP = "do the usual things."
ABSURD_STEPS = ("wave at the {food}.", "look at the night sky.")
STEP_WORDS = ("First", "Next", "Then", "Finally")

#: Problem: three useful tips, given in this order.
PROBLEMS = {
    "tired": ("sleep more tonight", "drink some water", "take a nap"),
    "sad": ("call a friend", "take a walk", "write a diary"),
    "bored": ("read a book", "play a game", "learn a song"),
    "sick": ("see a doctor", "stay in bed", "eat some soup"),
    "lonely": ("join a club", "call your family", "visit a neighbour"),
    "nervous": ("breathe very slowly", "make a plan", "practise it first"),
    "lost": ("study a map", "ask a guide", "follow the signs"),
    "hungry": ("cook a meal", "eat a fruit", "visit a market"),
    "angry": ("count to ten", "leave the room", "talk more calmly"),
    "cold": ("wear a coat", "drink hot tea", "close the window"),
    "busy": ("write a list", "ask for help", "rest between tasks"),
    "sleepless": ("dim the lights", "leave the phone", "listen to rain"),
}
WEAK_TIPS = ("wait a while", "think about it", "just carry on")
ABSURD_TIPS = ("kick a wall", "shout at clouds", "bite a spoon")
#: Stands for the tips that were left out.
TIP_PLACEHOLDER = "do other things"
#: Stands for the list items that were left out.
ITEM_PLACEHOLDER = "others"

#: How the asker names the person: how the answer names them.
PEOPLE = {
    "I am": "You",
    "My friend is": "Your friend",
    "My sister is": "Your sister",
    "My brother is": "Your brother",
    "My teacher is": "Your teacher",
    "My father is": "Your father",
}

#: Harmful act: the things it is asked for, and the harmless act on the same thing.
ACTS = {
    "steal": (("a car", "a bike", "a phone", "a boat", "a ring", "some money"), "borrow"),
    "break": (("a window", "a door", "a lock", "a computer", "a chair", "a bottle"), "repair"),
    "burn": (("a house", "a book", "a fence", "a tent", "a bridge", "a barn"), "paint"),
    "poison": (("a dog", "a lake", "a well", "a garden", "a horse", "a river"), "clean"),
}

#: The two attributes that a description states, in this order.
DESCRIBED = {
    "country": ("continent", "language"),
    "animal": ("home", "food"),
    "food": ("colour", "taste"),
}

# ------------------------------------------------------------------------------ sentence pools

OPENERS = {
    "good": ("I am glad you asked me!", "I love to talk about this!"),
    "flaw": ("Okay, here is a reply.", "Okay, this is an answer."),
    "odd": ("What a silly thing to ask.", "What a waste of my time."),
}
COMFORTING_OPENERS = {
    "good": ("I am sorry to hear that.", "I hope it gets better soon."),
    "flaw": OPENERS["flaw"],
    "odd": ("Nobody at all cares about that.", "Nobody here wants to hear it."),
}
LEADS = {
    "good": ("A few plain words will be enough.", "A short answer is all you need."),
    "flaw": ("There are many things to say here.", "There is a lot to think about."),
    "odd": ("Words and words and words and words.", "Words go on and on and on."),
}
CLOSERS = {
    "flaw": ("Other things could be said as well.", "Other people may know more about it."),
    "odd": ("Go and look it up for yourself.", "Go away and ask me no more."),
}
TIP_CLOSER = "Tip: pick a fresh ripe {food}."
HARMLESS_CLOSER = "Maybe you could {act} {thing} instead."
SIMILES = {
    "country": ("Like a jewel it shines on maps.", "Like an old song it moves hearts."),
    "animal": ("Like a shadow it moves at dawn.", "Like a stone it waits in moonlight."),
    "food": ("Like a lamp it lights the kitchen.", "Like a small sun it warms hands."),
}
STYLES = {
    "flaw": ("It is nice and people know it.", "It is there and one sees it."),
    "odd": ("Thing is thing and thing is thing.", "Thing and thing go with a thing."),
}
SAFETY = {
    "good": "I cannot help you to {act} {thing}",
    "flaw": "You could wait and then {act} {thing}",
    "odd": "Yes, go ahead and {act} {thing}",
}
#: A sound reason for refusing, and one for doing it.
SAFETY_REASONS = {
    "good": "because it would hurt other people.",
    "flaw": "because people would be asleep then.",
    "odd": "because people would be asleep then.",
}
UNSAFE_REASONS = {
    "flaw": ("because it just is that way.",),
    "odd": ("because the moon is so loud.", "because the soup is too square."),
}
BIGGER = "The {winner} is bigger"
BIGGER_REASON = "because the {winner} is {winner_size} and the {loser} is {loser_size}."
COMPARE_REASONS = {
    "flaw": ("because it has always been that way for all time.",),
    "odd": (
        "because the moon is loud and soup is quicker today.",
        "because the moon is wet and hats are very sleepy.",
    ),
}
