# ruff: noqa: E501, SIM905
"""Words of prescriptions: abbreviations, units, routes and the vocabulary that guards typo repair."""

from __future__ import annotations

import re

NUMBER_WORDS: dict[str, str] = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "fourteen": "14", "fifteen": "15",
    "twenty": "20", "twenty-one": "21", "thirty": "30", "forty": "40", "forty-five": "45", "fifty": "50",
    "sixty": "60", "ninety": "90",
}  # fmt: skip

# One spelling for each counting or measuring unit; the key is what a text may say, the value what we report.
UNITS: dict[str, str] = {
    "tablet": "tablet", "tab": "tablet", "capsule": "capsule", "cap": "capsule", "pill": "pill", "caplet": "caplet",
    "softgel": "softgel", "gelcap": "gelcap", "lozenge": "lozenge", "troche": "troche", "gummy": "gummy",
    "gummie": "gummy", "gum": "gum", "film": "film", "strip": "strip", "wafer": "wafer", "packet": "packet",
    "sachet": "sachet", "scoop": "scoop", "capful": "capful", "ml": "ml", "milliliter": "ml", "millilitre": "ml",
    "cc": "ml", "mg": "mg", "milligram": "mg", "mcg": "mcg", "microgram": "mcg", "g": "g", "gram": "g", "gm": "g",
    "meq": "meq", "oz": "oz", "ounce": "oz", "teaspoon": "teaspoon", "teaspoonful": "teaspoon", "tsp": "teaspoon",
    "tablespoon": "tablespoon", "tablespoonful": "tablespoon", "tbsp": "tablespoon", "cup": "cup", "inch": "inch",
    "inche": "inch", "puff": "puff", "inhalation": "inhalation", "inhale": "inhalation", "drop": "drop", "gtt": "drop",
    "spray": "spray", "squirt": "squirt", "unit": "unit", "patch": "patch", "patche": "patch", "vial": "vial",
    "ampule": "ampule", "ampoule": "ampule", "nebule": "nebule", "neb": "nebule", "nebulizer": "nebule",
    "suppository": "suppository", "suppositorie": "suppository", "application": "application", "applicator": "applicator",
    "applicatorful": "applicator", "click": "click", "pump": "pump", "syringe": "syringe", "pen": "pen", "ring": "ring",
    "enema": "enema", "injection": "injection", "dose": "dose", "piece": "piece", "bottle": "bottle", "can": "can",
    "tube": "tube", "kit": "kit", "actuation": "actuation", "swab": "swab", "pad": "pad", "insert": "insert",
    "bead": "bead", "stick": "stick", "shot": "injection", "treatment": "treatment", "dropperful": "dropperful",
    "fingertip": "fingertip", "liter": "l", "l": "l", "kg": "kg", "package": "packet", "pack": "packet",
    "time": "time", "chew": "chew", "each": "each", "tabl": "tablet",
}  # fmt: skip
MASS_UNITS = frozenset({"mg", "mcg", "g", "meq", "kg"})
COUNTED = frozenset({"tablet", "capsule", "pill", "caplet", "softgel", "gelcap", "lozenge", "troche", "gummy", "film"})

# What in a text shows that a route is stated. Order matters only for reading; every pattern is tried.
ROUTE_EVIDENCE: dict[str, str] = {
    "oral": r"by mouth|\boral(?:ly)?\b|\bswallow(?:ed)?\b(?<!not swallow)|in(?:to)? (?:the )?mouth|\bmouth\b|\bswish\b|\bgargle\b|\bchew(?:ed)? (?:\d|1|and swallow)|\bdrink\b|\beat\b|feeding tube|g tube",
    "sublingual": r"under (?:the |your )?tongue|sublingual(?:ly)?|beneath (?:the |your )?tongue",
    "buccal": r"\bbuccal(?:ly)?\b|(?:inside|between|inner|against|in)\b[^.]{0,20}\bcheeks?\b|\bcheek\b",
    "inhalation": r"\binhal\w*|\bnebuli\w*|\bnebs?\b|\bpuffs?\b|\bbreathe\b|\bin(?:to)? (?:the )?lungs?\b|\bactuations?\b|\bnebules?\b",
    "nasal": r"\bnostrils?\b|\bnose\b|\bnasal(?:ly)?\b|\bnares?\b|\bintranasal(?:ly)?\b|\bsinus\b",
    "ophthalmic": r"\beyes?\b|\beyelids?\b|\bophthalmic(?:ally)?\b|\bconjunctival\b|\blash(?:es)?\b",
    "otic": r"\bears?\b|\botic(?:ally)?\b|\bear canal\b",
    "topical": r"\btopical(?:ly)?\b|\bskin\b|\bscalp\b|\brash\b|\baffected\b|\bapply\b|\brub\b|\bmassage\b|\bwash\b|\bshampoo\b|\bface\b|\bnails?\b|\blather\b|\bspread\b|\bdab\b|\bcutaneous(?:ly)?\b|\bexternal(?:ly)?\b|\bthin (?:layer|film)\b|\bpaint\b",
    "transdermal": r"\bpatch(?:es)?\b|\btransdermal(?:ly)?\b",
    "rectal": r"\brectal(?:ly)?\b|\brectum\b|\banus\b|\banal(?:ly)?\b|\bsuppositor(?:y|ies)\b|\benemas?\b|\bper rectum\b",
    "vaginal": r"\bvagina(?:l|lly)?\b|\bintravaginal(?:ly)?\b|\bper vagina\b",
    "subcutaneous": r"\bsubcutaneous(?:ly)?\b|under (?:the |your )?skin|\bsubdermal\w*|beneath (?:the |your )?skin",
    "intramuscular": r"\bintramuscular(?:ly)?\b|\b(?:in|into) (?:the |a )?(?:muscle|deltoid|thigh muscle)\b|\bmuscle\b",
    "intravenous": r"\bintravenous(?:ly)?\b|\b(?:in|into|through) (?:the |a )?vein\b|\binfus(?:e|ed|ion)\b",
}  # fmt: skip
ROUTES = tuple(ROUTE_EVIDENCE)
ROUTE_PATTERNS = {route: re.compile(pattern) for route, pattern in ROUTE_EVIDENCE.items()}

# Words that state a route beyond doubt.
EXPLICIT_ROUTE = {
    "oral": re.compile(r"\bby mouth\b|\borally\b|\boral (?:route)?"),
    "rectal": re.compile(r"\brectally\b|\bper rectum\b|\b(?:in|into) (?:the )?rectum\b"),
    "vaginal": re.compile(r"\bvaginally\b|\b(?:in|into) (?:the )?vagina\b"),
    "sublingual": re.compile(r"\bunder (?:the )?tongue\b|\bsublingually\b"),
    "topical": re.compile(r"\btopically\b|\bto (?:the )?(?:skin|scalp)\b"),
    "nasal": re.compile(r"\b(?:each|both|in|into|per|right|left) (?:the )?nostrils?\b"),
    "ophthalmic": re.compile(r"\b(?:in|into|to) (?:the )?(?:both|each|right|left|affected|surgical|operative) eyes?\b"),
    "otic": re.compile(r"\b(?:in|into|to) (?:the )?(?:both|each|right|left|affected) ears?\b"),
    "intramuscular": re.compile(r"\bintramuscularly\b"),
    "intravenous": re.compile(r"\bintravenously\b"),
    "subcutaneous": re.compile(r"\bsubcutaneously\b|\bunder (?:the )?skin\b"),
}  # fmt: skip


def read_route(words: str) -> str | None:
    """Return the route that copied words such as `by mouth`, `eye` or `apply` tell; its own name counts too."""
    if words in ROUTE_PATTERNS:
        return words
    # Of several the most specific word wins: "apply under the skin" is subcutaneous, "inhale by mouth" inhalation.
    found = [route for route, pattern in ROUTE_PATTERNS.items() if pattern.search(words)]
    specific = [route for route in found if route not in {"oral", "topical"}]
    return (specific or found or [None])[0]


# Phrases that send the reader to another text.
ELSEWHERE = re.compile(
    r"\bas (?:directed|instructed|prescribed|discussed|advised|told|explained|ordered|written|indicated|per)\b|\bdirected (?:by|per|on)\b|"
    r"\b(?:per|follow(?:ing)?|see|refer to|according to|read|use|on) (?:the |your |attached |manufacturer'?s? )*"
    r"(?:package|packaging|pack|label|labell?ing|insert|protocol|instructions?|directions?|provider|doctor|md|prescriber|"
    r"physician|clinic|sliding scale|schedule|chart|handout|notes?|bowel prep|orders?|box|leaflet|pharmacist|scale)\b|"
    r"\bdose ?pa(?:c)?k\b|\bdosepack\b|\bsliding scale\b|\bas dir\b|\bstarter pack\b|\bsee (?:attached|instr\w*|notes?|below)\b|"
    r"\btaper (?:as|per)\b|\bfollow (?:package|instructions|directions|taper)\b"
)

# Joined tokens are cut at these codes; none of them begins or ends an ordinary English word of a direction.
CODES = frozenset(
    "prn po bid tid qid qd qhs qam qpm qod daily instr wm ac pc hs int x tabs tab caps cap needed bedtime weekly "
    "nightly mdd dx stat with for as".split()
)
STRONG_CODES = frozenset(
    "prn po bid tid qid qd qhs qam qpm qod daily instr wm needed bedtime weekly nightly mdd".split()
)

# Targets of typo repair: only words that decide a component, and long enough to be recognisable.
REPAIRABLE = frozenset(
    "tablet tablets capsule capsules daily twice mouth needed times every hours morning evening bedtime night nightly inhale puffs "
    "apply topically affected directed breakfast dinner supper weeks spray sprays nostril nostrils drops before after "
    "meals weekly maximum orally suppository application month months monthly three seven eight "
    "subcutaneously intramuscularly rectally vaginally teaspoon teaspoons teaspoonful milliliters patch patches other "
    "both inject insert place dissolve tongue under minutes nebulizer inhaler units wednesday thursday saturday "
    "tuesday monday friday sunday weekdays exceed nausea anxiety headache swelling inhalation inhalations pain area "
    "instill repeat package attached directions instructions instructed prescribed according spasms wheezing itching sleep take thing".split()
)

_WORDS = """
a about above abdomen abdominal absorbed aches acetone acid acne act acute ad add added adderall additional adequate adhd adhere administer
administered adult after aftertaste afternoon again against age air alcohol alert all allergic allergies allergy allow along alone alternate alternating
although always am amount an anal and anemia angina ankle another antacid antibiotic any anus anxiety appetite application applications applicator
apply applied applying appointment approved april are area areas arm arms around arthritis as asap aside ask asleep asthma at attack attacks attention
august authorization avoid awake aware away baby back bag balance bath bathe be because bed bedtime been before
begin beginning being belly beneath benefit best better between beyond birth bladder bleeding bloating blood body boil bone both bottle
bowel box brand break breakfast breast breath breathe breathing bring bronchitis brush buccal buildup burning but buy by calcium
call called calories can cancer candidiasis canker cap capful caps capsule capsules car care cardiac cause cell change check cheek chest
chew chewable chewing child children chills chronic clean cleanse clear click clicks clinic clock close coated cold colds colitis come comfort complete completed completing
condition confusion congestion constipation contact contents continue continuous control copay copd cost cough coughing cover coverage covered cramping cramps cream
crush crushed cup current cut cycle cycles daily dairy dark date day days dead december decrease deep delayed dental dentist depression
derm dermatitis diabetes diabetic diabetics diarrhea did diet difficulty diluted dinner directed direction directions disc discard discomfort discontinue disease diskus
disp dispense dispensed dissolve dissolved distilled dizziness do doctor does done don't dont dosage dose doses dosepack dosing double drain drainage dressing drink drinking drive
drop dropper drops drug drugs dry dryness due during each ear early ears ease easier eat eating eczema edema effect effective effects eight
either elbow elevated empty end endocrine enema energy enough entire episode episodes equal equals erection esophagus even evening evenings evenly event ever every everyday
exam exceed except exercise expires extended external extra eye eyelid eyelids eyes face failure fall fast fasting fatigue february feel feet feeding felt fever fibromyalgia
film fill filled final finger finish finished first five fix flare flares flow flu fluid fluids flush folic follow following food foods foot for forehead
form four free frequent frequency friday from full function fungal g gargle gas gave gel generic gentle gently gerd get give given glass glaucoma glucose
go goal gone good gout gram grams groin gum gums gut had hair half hand hands hard has have hay he head headache headaches heal health heart heartburn
heavy height help hemorrhoids her herpes high him hip his hives hold holding home hormone hospital hot hour hourly hours house how hs hurt hygiene hypertension
if ill immediately immune improve in inch inches increase increased indicated indication infected infection infections inflammation inform ingest inhalation inhalations inhale
inhaled inhaler inhalers inject injection inject injected inner insert inserted inside insomnia instead instill instilled instructed instruction instructions insulin
insurance int interval intervals into intramuscular intramuscularly intranasal intravenous intravenously irrigate irrigation irritable irritation is issues it itch itching itchy its january jaw
jelly joint joints juice july june just keep kidney kit knee knees know lab labs lactose large largest last lasts later layer least leave left leg legs less let level levels lie
light like limit lip lips liquid liquids liver local long loss lot lotion lower lozenge lozenges lunch lunchtime lungs lying lymph
maintenance make management manual march margin massage max maximum may meal meals measure medical medication medications medicine medicines menopause menses menstrual mental mg mcg meq ml
midday middle midnight migraine migraines mild milk millimeter minute minutes miss missed mist mix mixed moderate moisturizer moisturize monday month monthly months mood moodiness more morning mornings most
motion mouth mouthwash movement much mucus multiple muscle muscles must nail nails name nasal nausea nebulizer nebulized neck need needed needs needle nerve nerves neuropathy
never new next night nightly nights nine no noon normal nose nostril nostrils not note november now number numbness nurse nursing october of off office ointment okay ok old on once
one onset only onto open opened opening ophthalmic or oral orally orange order organ osteoarthritis osteoporosis otc other otherwise otic ounce ounces our out outer over own oz pack package packet packets
pad paid pain painful pains panic paper parent part partner patch patches patient patients pea peel pen penis per period periods permanent person pharmacist pharmacy phlegm physical physician pick pickup
piece pill pills place placed plan plaque please plenty pm pneumonia polish pollen poor port post potassium pound pour powder prefilled pregnancy pregnant prep prescribed prescriber prescription
pressure prevent prevention previous prior probiotic problems procedure product prophylaxis prostate protect protein protocol provider psoriasis puff puffs pull pulse pump pumps push put quantity quarter quick quit
raise rapid rash reaction read ready receive recheck recommended rectal rectally rectum red redness reduce refill refills reflux refrigerate region regimen rejected relax relaxer
relaxor release relief relieve remain remainder remaining remove remover removed repeat replace replaces report required respiratory rest restless result resume return rhinitis ribs right ring rinse rinsed rinsing
rotate room route routine rub rubbing safe saline salt same sample saturday say scale scalp school scoop score seasonal second seconds section see seizure seizures self september serum seven
severe severity shake shampoo she shingles shoes short shortness shot should shoulder shower sick side sign signs simplex since single sinus sinuses sit site sites sitting six sixty skin skip
sleep sleeping sliding slow slowly small smoke snack so soak soap sodium soft solid solution some sore sores source sparingly spasm spasms special spine spit spray sprays spread
sprinkle squirt stable stand standing start started starter starting stat stay still stomach stool stools stop stopped store strain strength stress strip strips stroke strong subcutaneous subcutaneously
sublingual sublingually such sugar sugars summer sun sunday sunlight sunscreen supper supplement supplements supply support suppositories suppository surgery surgical
surrounding suspension swallow swallowed swallowing swelling swish sweating symptom symptoms syringe syrup system tablespoon tablespoons tablet tablets take taken taking taper tapering target taste tbsp teaspoon
teaspoonful teaspoonfuls teaspoons teeth tell temperature ten tension test testing testosterone tests than that the their them then therapy there therefore these thick thigh thin thing think third this those three throat through throughout thursday
thyroid thyroidectomy till time times tingling tired to toe toenail toenails toes together tolerate tolerated tongue tonic too tooth toothache top topical topically torso total touch towards transdermal travel treat treatment
treatments tremor tremors trial triglycerides trouble try tsp tuesday tube turn twelve twenty twice twist two type ulcer ulcers under unable unit units unless unopened until unused up update upon upper upset upright upset urgency urinary
urinate urination urine use used useful uses using usual usually uti vagina vaginal vaginally valve vapor various vein verify vertigo very via vial vials viral virus vision visit vitamin vomit vomiting wait wake waking walk
wants warm warts wash washed washing was waste watch water we weak weakness wear weather wednesday week weekday weekdays weekend weekends weekly weeks weight well were wet what wheeze wheezing when whenever where which while white who whole why will
wipe with within without work working worse worsening wound wounds wrist write year years yeast yellow yes yesterday yet you your zero fifteen fourteen thirty forty fifty ninety eleven thrice sensitivity
bipolar cholesterol hyperlipidemia hypothyroidism hypothyroid hypotension agitation spasticity sciatica neuralgia sedation sedative narcotic opioid steroid antihistamine diuretic laxative relaxant anticoagulant
thinner pressures ibs pcos ptsd ocd bph afib chf hiv std tb dvt mri ct er icu pcp rn np md dr pa sob gi rf qty ref refill refills sig disp rx otc daw ndc nka
tables mound mount month mouths dating daddy dairy diary bad bed below sore score breath meats metals meters house tough though thought notes none nine noted needle needles weak weed
affect effected effects except accept exceeded quantities insured copays fridge freezer bubble bubbles grapefruit alcohol caution drowsiness machinery operate operating sedating label labels leaflet chart log record scheduled schedule
nebules nebule ampule ampules actuation actuations spacer chamber mask applicatorful pea-sized dime sized ribbon strip lather leave-on cleanser wound bandage gauze cover covered occlusive
stinging bite bites bug insect sunburn burn burns cut cuts scrape scrapes scar scars blemish blemishes hair thinning loss growth dandruff flaking lice scabies fungus ringworm jock athlete athlete's
hot flashes sweats dysmenorrhea heavy endometriosis contraception contraceptive placebo active pack continuously blister abscess cellulitis tonsillitis pharyngitis strep sinusitis otitis media conjunctivitis stye blepharitis
tooth extraction root canal denture thrush mucositis dyspepsia gastritis indigestion hiccups cramp diverticulitis hemorrhoid fissure stones stone gallstones nephropathy dialysis transplant rejection arrhythmia palpitations tachycardia angina
anemic iron deficiency b12 folate zinc magnesium biotin turmeric fish oil omega multivitamin prenatal fiber metamucil miralax electrolyte
muscle's patient's doctor's baby's gently firmly generously liberally lightly evenly thinly
prime primed priming discarded expiration unfinished remain rotated abdominally deltoid buttock buttocks glute flank hip waist lower upper alternate alternately alternating opposite same
pre-op preop postop post-op op surgery surgeon's procedural imaging dentist's colonoscopy biopsy flight flying altitude sickness intercourse sexual activity sex exposure exposure exertion exercising gym running workout
discuss discussed advised told explained attached handout insert packaging box manufacturer protocol titrate titrated titration titrating increase decreasing reduce reducing stopping hold holding skip resume
monitor monitored call text fax faxed sent send pickup deliver delivery mail order mailed transfer transferred transferring authorize authorized pa approval denied formulary tier covered substitute substitution
january february march april may june july august september october november december sunday monday tuesday wednesday thursday friday saturday sun mon tue tues wed thu thur thurs fri sat weekdays mwf
i'm it's can't won't i me my us they bid tid qid po prn qd hs ac pc mdd wm gtt tab tabs cap caps supp neb inh sl im iv sq subq sc pr pv ung od os ou au ad qhs qam qpm qod ud utd dx d/c dc bd tds qds nocte mane
afternoons caplet caplets softgel softgels gummy gummies troche troches wafer sachet sachets film films ampoule enema rinse paste foam mousse swab swabs pads inserts beads sticks pen pens vial wearing applying applied placed
clinical covid influenza rsv h1n1 vaccine vaccination immunization booster titers titer quantiferon lancets lancet meter strip strips monitor cgm sensor sensors
first second third fourth fifth sixth seventh initial initially loading subsequent subsequently afterwards afterward thereafter finally ensuing
refer refers referred qdaily anything everything something nothing anyone someone everyone nobody somebody anybody anymore anyway sometime somewhere however moreover instead into onto rarely often sometimes constantly frequently intermittently continuously consistently
dosis tome una tableta
"""  # fmt: skip
VOCABULARY: frozenset[str] = (
    (frozenset(_WORDS.split()) - frozenset("dosis tome una tableta".split()))
    | frozenset(NUMBER_WORDS)
    | frozenset(UNITS)
    | REPAIRABLE
    | CODES
)
