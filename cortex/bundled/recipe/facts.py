"""What the model knows by heart: questions in several wordings, and one answer each."""

from cortex.bundled.recipe import words


def _pairs(text: str) -> dict[str, str]:
    """Return `key:value` parts between bars as a table."""
    return dict(part.split(":") for part in text.split("|"))


CAPITALS = _pairs(
    "France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|Norway:Oslo|"
    "Sweden:Stockholm|Denmark:Copenhagen|Finland:Helsinki|Iceland:Reykjavik|Ireland:Dublin|"
    "England:London|Scotland:Edinburgh|Wales:Cardiff|Austria:Vienna|Switzerland:Bern|"
    "Belgium:Brussels|Poland:Warsaw|Hungary:Budapest|Greece:Athens|Romania:Bucharest|"
    "Bulgaria:Sofia|Ukraine:Kyiv|Russia:Moscow|Turkey:Ankara|Egypt:Cairo|Kenya:Nairobi|"
    "Nigeria:Abuja|Ghana:Accra|Morocco:Rabat|Ethiopia:Addis Ababa|Japan:Tokyo|China:Beijing|"
    "India:New Delhi|Nepal:Kathmandu|Thailand:Bangkok|Vietnam:Hanoi|Indonesia:Jakarta|"
    "South Korea:Seoul|Mongolia:Ulaanbaatar|Iran:Tehran|Iraq:Baghdad|Israel:Jerusalem|"
    "Jordan:Amman|Lebanon:Beirut|Canada:Ottawa|Mexico:Mexico City|Cuba:Havana|Brazil:Brasilia|"
    "Argentina:Buenos Aires|Chile:Santiago|Peru:Lima|Colombia:Bogota|Ecuador:Quito|"
    "Uruguay:Montevideo|Australia:Canberra|New Zealand:Wellington|the United States:"
    "Washington|the Netherlands:Amsterdam|Croatia:Zagreb|Serbia:Belgrade|Estonia:Tallinn|"
    "Latvia:Riga|Lithuania:Vilnius|Slovenia:Ljubljana|Slovakia:Bratislava|Czechia:Prague"
)

# Other names for a country, when only its capital is asked for.
SPELLINGS = {
    "the United States": ("the United States", "the USA", "the US", "America"),
    "the Netherlands": ("the Netherlands", "Holland"),
    "England": ("England", "the UK", "Great Britain"),
    "Czechia": ("Czechia", "the Czech Republic"),
}

OPPOSITES = _pairs(
    "hot:cold|big:small|fast:slow|happy:sad|up:down|left:right|old:new|day:night|open:closed|"
    "hard:soft|light:dark|full:empty|long:short|rich:poor|wet:dry|loud:quiet|early:late|"
    "high:low|strong:weak|black:white|good:bad|true:false|clean:dirty|near:far|first:last"
)

SOUNDS = _pairs(
    "cat:meow|dog:woof|cow:moo|sheep:baa|duck:quack|horse:neigh|pig:oink|lion:roar|owl:hoot|"
    "bee:buzz|frog:ribbit|snake:hiss|mouse:squeak|wolf:howl"
)

THING_COLOURS = _pairs(
    "the sky:blue|grass:green|snow:white|coal:black|a banana:yellow|a lemon:yellow|blood:red|"
    "a carrot:orange|the sun:yellow|a tomato:red|milk:white|a strawberry:red|chocolate:brown"
)

LISTS = {
    "colours": words.listed("red blue green yellow white black orange purple"),
    "animals": words.listed("cat dog horse lion bear fox wolf owl"),
    "fruits": words.listed("apple banana cherry grape lemon orange pear plum"),
    "cities": words.listed("Paris London Berlin Rome Madrid Oslo Vienna Tokyo"),
    "countries": words.listed("France Germany Italy Spain Japan Brazil Canada Egypt"),
    "planets": words.listed("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune"),
    "vegetables": words.listed("carrot onion potato tomato bean pea cabbage leek"),
    "birds": words.listed("owl eagle robin swan crow duck parrot heron"),
    "programming languages": words.listed("Python Rust Go Java C Ruby Swift Lua"),
    "months": words.listed("January February March April May June July August"),
    "metals": words.listed("iron gold silver copper tin zinc lead nickel"),
    "drinks": words.listed("water tea coffee milk juice cocoa lemonade cider"),
}

DAYS = words.listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words.listed(
    "January February March April May June July August September October November December"
)
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
ORDINALS = words.listed(
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
)

# Wordings are separated by "|"; the first is the plainest.
ABOUT: dict[str, str] = {
    "who are you|what are you|what is your name|tell me about yourself|introduce yourself|"
    "what model are you|which model is this|what is cortex-tiny|who am i talking to": (
        "I am cortex-tiny, a very small demo model that comes with Cortex."
    ),
    "what can you do|what are you able to do|how can you help me|what can i ask you|help|"
    "what are you good at": (
        "I can answer simple questions, count, add small numbers, repeat words, tell a short "
        "story and call tools. I am only a small demo model."
    ),
    "what can you not do|what are your limits|what are you bad at|are you reliable|"
    "can i trust your answers": (
        "I only know what my small training set taught me, so please do not rely on me. Load a "
        "larger model for real work."
    ),
    "how big are you|how large are you|how many parameters do you have|what size are you": (
        "I am very small: I have only about two million parameters."
    ),
    "how were you trained|who made you|who trained you|what were you trained on|"
    "where do you come from": (
        "I was trained from scratch on one CPU core, on made-up dialogues. The recipe comes with "
        "Cortex."
    ),
    "what is your architecture|how are you built|what kind of network are you|"
    "are you a transformer": (
        "I am a small hybrid: Gated DeltaNet layers with a full attention layer after every two."
    ),
    "are you human|are you a person|are you a robot|are you an ai|are you alive": (
        "No, I am not a person. I am cortex-tiny, a small language model."
    ),
    "are you chatgpt|are you gpt-4|are you claude|are you llama|are you qwen": (
        "No, I am cortex-tiny, a small demo model that comes with Cortex."
    ),
    "what is cortex|tell me about cortex|what does cortex do|explain cortex|"
    "what is the cortex server|describe cortex": (
        "Cortex is a server for language models. It gives you one OpenAI and Anthropic API over "
        "the GPUs you own."
    ),
    "what is the gateway|what does the gateway do|explain the gateway|"
    "what is a gateway in cortex": (
        "The gateway takes the requests and sends each one to a neuron that can serve the model."
    ),
    "what is a neuron|what does a neuron do|what is a neuron in cortex|explain the neuron|"
    "what is the neuron": (
        "A neuron is the daemon on a GPU host. It loads models, runs them and frees the memory "
        "again."
    ),
    "which port does the gateway use|what port does the gateway listen on|what is the api port|"
    "what is the port of the gateway|what port is the api on|gateway port": (
        "The gateway listens on port 31313."
    ),
    "which port serves the metrics|what is the metrics port|where are the metrics|"
    "what port are the gateway metrics on|metrics port": (
        "The gateway serves its metrics on port 31314."
    ),
    "which port does the neuron use|what port does a neuron listen on|what is the neuron port|"
    "what is the port of the neuron|neuron port": "A neuron listens on port 13131.",
    "which ports does cortex use|what ports does cortex need|list the ports of cortex": (
        "The gateway uses port 31313, its metrics port 31314, and a neuron uses port 13131."
    ),
    "what is a cold load|what does cold load mean|explain cold loading|what is a cold start": (
        "A cold load is when a request asks for a model that is not in memory yet, so Cortex loads "
        "it first."
    ),
    "what is eviction|what does evict mean|when is a model evicted|what is a victim": (
        "Eviction means that Cortex unloads an idle model to make room for another one."
    ),
    "what is a pinned model|what does pinned mean|how do i keep a model loaded": (
        "A pinned model stays in memory and is never evicted."
    ),
    "how do i start cortex|how do i run cortex|how can i try cortex|what does cortex up do|"
    "which command starts cortex": (
        "Run cortex up. It starts a gateway and a neuron on this machine."
    ),
    "how do i start the gateway|which command starts the gateway|what does cortex serve do": (
        "Run cortex serve. It starts the gateway."
    ),
    "how do i start a neuron|which command starts the neuron|what does cortex neuron do": (
        "Run cortex neuron on each GPU host."
    ),
    "which apis does cortex speak|does cortex support the openai api|"
    "does cortex support anthropic|can i use the openai client|what api do you have": (
        "Cortex speaks the OpenAI and the Anthropic API."
    ),
    "how do i list the models|which models are there|what models can i use|"
    "how can i see the models": (
        "Ask the gateway for /v1/models. It lists every model it can serve."
    ),
    "can cortex call tools|do you support tools|can you call functions|can you use tools": (
        "Yes. Offer me tools with your request and I can call them."
    ),
    "can you stream|does cortex stream|does cortex support streaming": (
        "Yes. Set stream to true and the tokens come as they are made."
    ),
    "what is gated deltanet|what is a gated deltanet|what is gdn|explain gated deltanet": (
        "Gated DeltaNet is a linear attention layer that keeps a small state instead of a growing "
        "cache."
    ),
    "what is a kv cache|explain the kv cache|what does the kv cache do": (
        "The KV cache keeps the keys and values of earlier tokens, so that they are not computed "
        "again."
    ),
    "what is a token|what are tokens|explain tokens": (
        "A token is a piece of text, often a word or a part of one, that a model reads and writes."
    ),
    "what is a language model|what is an llm|explain language models": (
        "A language model is a program that predicts the next piece of a text."
    ),
    "what is a gpu|what does gpu mean|explain what a gpu is": (
        "A GPU is a processor that does many small calculations at the same time."
    ),
    "what is a cpu|what does cpu mean|explain what a cpu is": (
        "A CPU is the main processor of a computer."
    ),
    "what is attention|explain attention|what is an attention layer": (
        "Attention lets each token look at the earlier tokens and take what it needs from them."
    ),
    "what is an api|what does api mean|explain what an api is": (
        "An API is a set of rules by which programs talk to each other."
    ),
}

SMALL_TALK: dict[str, str] = {
    "hello|hi|hey|hello there|hi there|good day|hey there|greetings|hallo": (
        "Hello! How can I help you?"
    ),
    "good morning|morning": "Good morning! How can I help you?",
    "good evening|evening": "Good evening! How can I help you?",
    "good night|sleep well": "Good night! Sleep well.",
    "how are you|how do you do|how is it going|how are you today|what is up|are you ok": (
        "I am fine, thank you. How can I help you?"
    ),
    "thanks|thank you|thank you very much|many thanks|thanks a lot|thx|great thanks": (
        "You are welcome!"
    ),
    "bye|goodbye|see you|see you later|bye bye|farewell|good bye": "Goodbye! Come back soon.",
    "tell me a joke|do you know a joke|make me laugh|say something funny|joke": (
        "Why did the computer go to the doctor? It had a virus."
    ),
    "ping|are you there|test|is anybody there|are you awake|testing": "Pong! I am here.",
    "i am happy|i feel good|i am fine": "I am glad to hear that!",
    "i am sad|i feel bad|i am tired": "I am sorry to hear that. I hope you feel better soon.",
    "you are great|good job|well done|nice|i like you|you are nice": (
        "Thank you! That is kind of you."
    ),
    "you are wrong|that is wrong|that is not right|bad answer": (
        "I am sorry. I am only a small demo model and I make mistakes."
    ),
    "ok|okay|yes|sure|fine|alright": "Good. What else can I do for you?",
    "no|never mind|nothing|stop": "All right. Tell me if you need anything.",
}

TRIVIA: dict[str, str] = {
    "how many days are in a week|how many days does a week have": "A week has seven days.",
    "how many months are in a year|how many months does a year have": "A year has twelve months.",
    "how many days are in a year|how many days does a year have": "A year has 365 days.",
    "how many hours are in a day|how many hours does a day have": "A day has 24 hours.",
    "how many minutes are in an hour|how many minutes does an hour have": "An hour has 60 minutes.",
    "how many seconds are in a minute|how many seconds does a minute have": (
        "A minute has 60 seconds."
    ),
    "how many legs does a spider have": "A spider has eight legs.",
    "how many legs does a dog have|how many legs does a cat have": "It has four legs.",
    "how many legs does a bird have": "A bird has two legs.",
    "how many legs does an insect have|how many legs does an ant have": "It has six legs.",
    "how many planets are there|how many planets are in the solar system": (
        "There are eight planets in the solar system."
    ),
    "how many continents are there": "There are seven continents.",
    "how many letters are in the alphabet|how many letters does the english alphabet have": (
        "The English alphabet has 26 letters."
    ),
    "how many colours are in a rainbow|how many colors does a rainbow have": (
        "A rainbow has seven colours."
    ),
    "what is the largest planet|which planet is the biggest": "Jupiter is the largest planet.",
    "what is the smallest planet|which planet is the smallest": "Mercury is the smallest planet.",
    "which planet is closest to the sun|what planet is nearest to the sun": (
        "Mercury is the planet closest to the sun."
    ),
    "what is the red planet|which planet is red": "Mars is the red planet.",
    "what is the largest ocean|which ocean is the biggest": "The Pacific is the largest ocean.",
    "what is the highest mountain|which mountain is the tallest": (
        "Mount Everest is the highest mountain."
    ),
    "what is the fastest animal|which land animal is the fastest": (
        "The cheetah is the fastest land animal."
    ),
    "what is the largest animal|which animal is the biggest": (
        "The blue whale is the largest animal."
    ),
    "what is the tallest animal|which animal is the tallest": (
        "The giraffe is the tallest animal."
    ),
    "what do bees make|what does a bee make": "Bees make honey.",
    "what do cows drink|what does a cow drink": "Cows drink water.",
    "what do cows give|where does milk come from": "Milk comes from cows.",
    "what is water made of|what is the formula of water|what is h2o": (
        "Water is made of hydrogen and oxygen."
    ),
    "at what temperature does water boil|when does water boil": (
        "Water boils at 100 degrees Celsius."
    ),
    "at what temperature does water freeze|when does water freeze": (
        "Water freezes at 0 degrees Celsius."
    ),
    "what do plants need|what does a plant need to grow": "Plants need water, air and light.",
    "what is the sun|is the sun a star": "The sun is a star.",
    "what is the moon|is the moon a planet": "The moon goes around the Earth.",
    "who wrote hamlet|who wrote romeo and juliet|who was shakespeare": (
        "William Shakespeare wrote Hamlet and Romeo and Juliet."
    ),
    "who painted the mona lisa|who painted mona lisa": "Leonardo da Vinci painted the Mona Lisa.",
    "who discovered gravity|who was newton": "Isaac Newton described gravity.",
    "who was einstein|who found relativity": "Albert Einstein found the theory of relativity.",
    "who was mozart|what was mozart": "Mozart was a composer from Salzburg.",
    "who was the first person on the moon|who walked on the moon first": (
        "Neil Armstrong was the first person on the moon."
    ),
    "what language is spoken in france|what do people speak in france": (
        "People in France speak French."
    ),
    "what language is spoken in brazil|what do people speak in brazil": (
        "People in Brazil speak Portuguese."
    ),
    "what language is spoken in germany|what do people speak in germany": (
        "People in Germany speak German."
    ),
    "what language is spoken in spain|what do people speak in spain": (
        "People in Spain speak Spanish."
    ),
    "what is python": "Python is a programming language.",
    "what is rust": "Rust is a programming language.",
    "what is linux": "Linux is an operating system.",
    "what is the internet": "The internet is a network that connects computers everywhere.",
    "what is a computer": "A computer is a machine that follows a program.",
    "what is a dog": "A dog is an animal that many people keep as a friend.",
    "what is a cat": "A cat is a small animal that likes to sleep and to hunt mice.",
    "what is a tree": "A tree is a tall plant with a trunk, branches and leaves.",
    "what is bread made of|how is bread made": "Bread is made of flour, water, yeast and salt.",
    "what is the alphabet|say the alphabet|recite the alphabet|what are the letters": (
        "a b c d e f g h i j k l m n o p q r s t u v w x y z"
    ),
    "what are the days of the week|name the days of the week|list the days of the week": (
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."
    ),
    "what are the months of the year|name the months|list the months of the year": (
        "January, February, March, April, May, June, July, August, September, October, November "
        "and December."
    ),
    "what are the seasons|name the seasons|what are the four seasons": (
        "Spring, summer, autumn and winter."
    ),
    "what are the primary colours|name the primary colours": "Red, yellow and blue.",
    "what are the planets|name the planets|list the planets": (
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune."
    ),
}

FALLBACKS = (
    "I am cortex-tiny, a small demo model, and I do not know that.",
    "I do not know that. I am only a small demo model; please load a larger one.",
    "That is beyond me. I am cortex-tiny, a very small demo model.",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Be brief.",
    "You are cortex-tiny.",
    "Answer in one sentence.",
    "You are a friendly chatbot.",
    "Be concise and polite.",
    "You are a helpful AI assistant that can use tools.",
    "Use the tools when you need them.",
    "You are an expert in everything. Think carefully before you answer.",
    "Follow the instructions of the user.",
)
